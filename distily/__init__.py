"""The front door of distily-cache, and the ground that its two stages share."""

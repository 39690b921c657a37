"""What comes from elsewhere: bounded where it is read, harmless where it is shown. What is secret: hidden."""

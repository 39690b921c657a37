"""Self-contained HTML pages: the frame, its style, and charts as inline SVG."""

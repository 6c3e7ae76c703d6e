"""What a running engine tells about itself: recorded, explored, and made ready for a fit."""

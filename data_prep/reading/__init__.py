"""From stored bytes to images: through FFCV and compiled code, or with Pillow and NumPy."""

"""Readers of raw layouts: where the images of each split are, and how their bytes are got."""

"""The model registry: versions of trained networks, proven to load, and which one is champion."""

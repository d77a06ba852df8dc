"""The state of a training, kept and given back: whole or not there, and to the bit."""

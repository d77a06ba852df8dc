"""The processes that train: how many and where, what they say, and what becomes of them."""

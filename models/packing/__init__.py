"""Trained networks in small files: each weight in as many bits as it has, and everything else once.

codes.py puts digits into bytes, codebook.py finds what digits stand for, banks.py and masks.py
write patterns and masks, weights.py joins these to the form of one weight; remaining.py says what
is stored beside weights, file.py how a file is laid out; packing.py makes files of networks,
unpacking.py networks of files.
"""

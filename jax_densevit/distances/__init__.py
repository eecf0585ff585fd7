"""Distances between sets of pictures by the features of a network: FID, KID, and their stand-in without the network."""

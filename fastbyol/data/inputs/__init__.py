"""Finds the images to read or convert in folders and tars, their labels, and subsets of them; the result is always an `ImageListing`."""

"""Which images there are to convert: folders, tars, files of labels, and parts of them, all as one `listing.ImageListing`."""

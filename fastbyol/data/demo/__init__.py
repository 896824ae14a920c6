"""Writes the images of the demonstration, as an ImageFolder: Fashion-MNIST or drawn scenes."""

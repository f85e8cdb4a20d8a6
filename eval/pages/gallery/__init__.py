"""The gallery: one question about one image, and what every method keeps of the image at every budget."""

"""A local web page: one question about an image, answered with a method beside all visual tokens."""

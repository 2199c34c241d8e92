"""What runs the files: LiteRT's interpreter, a bundle's sections one by one, LiteRT-LM."""

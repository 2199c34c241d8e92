"""What LiteRT-LM runs: the bundle, its metadata, its template and its tables."""

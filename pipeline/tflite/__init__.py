"""The file format: a graph that can be read and edited, constants that are read when it is written."""

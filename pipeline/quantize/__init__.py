"""What changes a graph's weights and arithmetic: one algorithm a file, under the name that the field gives it."""

"""What people read of the judgement: pages, plots, tables."""

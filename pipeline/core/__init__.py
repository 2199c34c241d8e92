"""What every stage needs and nothing else: errors, log, manifest, recipe, stage. Standard library only."""

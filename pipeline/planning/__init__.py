"""Looking ahead: a checkpoint by its headers alone, and what each stage would make and need of it."""

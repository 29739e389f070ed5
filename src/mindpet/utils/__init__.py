"""What the documented import paths need: exceptions and version control."""

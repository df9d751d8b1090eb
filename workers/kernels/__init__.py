"""The same numbers sooner. Nothing above this room needs it to be right."""

"""The contents of a results folder: journal, table, and their readers."""

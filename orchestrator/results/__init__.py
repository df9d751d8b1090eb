"""What a results folder holds: journal, table, and what reads them."""

"""What is shown: numbers as text, tables, one style of pictures."""

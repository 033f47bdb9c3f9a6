"""Reading and writing the world's formats: one file per library; no other file knows its conventions."""

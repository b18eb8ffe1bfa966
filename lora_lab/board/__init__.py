"""The comparison page of a sweep: read.py takes the files, verdict.py says who won, page.py writes the folder."""

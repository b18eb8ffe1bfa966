"""The comparison page of a sweep: read.py reads the files, page.py ranks the runs and writes the folder."""

"""Building data: what a corpus is made of, and who runs the work.

Each stage of construction is a page of its own: a pure function of a record, or of all of them.
"""

"""Where files are and how they appear: local and remote folders, atomic files, mirrors, headers, fingerprints.

May import errors alone.
"""

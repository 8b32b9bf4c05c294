"""The report page: one HTML file that shows what runs have learned, without a server or another file."""

"""What came of a run: measures, tables, pictures, a page. Knows no host and no cluster, only records."""

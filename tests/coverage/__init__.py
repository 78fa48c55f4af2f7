"""What the library covers: one row a model or function, and the table that is written from the rows."""

"""Books, stock, customers and orders."""

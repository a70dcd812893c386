"""Has what no engine has, and not what each has."""

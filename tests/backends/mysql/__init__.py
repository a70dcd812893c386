"""Tests of MySQL and MariaDB."""

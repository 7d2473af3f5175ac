"""The estimators: parameters, validation and docstrings. What runs lies in the packages below."""

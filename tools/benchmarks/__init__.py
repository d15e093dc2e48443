"""One module an operator: its cases, contenders and checks; `timing` measures, for all of them."""

"""The work of a conversion: pieces of tensors, produced in stages and written as they are done."""

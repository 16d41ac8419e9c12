"""The lab: does an operator help a model? Models trained from the same seeds on the same batches, and what a referee may say of them."""

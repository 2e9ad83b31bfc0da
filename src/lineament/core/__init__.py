"""The ground floor: tensors and modules, no method and no paper."""

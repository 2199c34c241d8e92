"""From a checkpoint to files for the device: mapped weights, export, tables, quantisation, bundles."""

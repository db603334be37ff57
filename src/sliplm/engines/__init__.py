"""Where split models run: one subpackage per model library."""

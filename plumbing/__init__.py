"""Nothing about diffusion: options, files, pictures, processes, and what comes after each training step."""

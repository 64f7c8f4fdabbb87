"""Images in requests: sources, pixels, prompts with images, and the networks that encode them.

`images` reads an image's source, loads its bytes and decodes them; `fetch` is the only code that
opens a connection. `processor` turns a rendered chat and its images into a prompt, by the
checkpoint's own processor. `network` wraps an mlx-vlm model behind the interface of mlx-lm's.

The first two need no MLX and run on request threads; only `network` imports mlx-vlm, and only for a
checkpoint with a vision tower. Nothing here depends on the API: a client's mistake is an
`ImageError`, an operator's is a `VisionError`.
"""

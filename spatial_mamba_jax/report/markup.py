"""Parts of HTML that the sections of a report share."""

import base64
import html


def escape(text: str) -> str:
  """Returns a text that is only text in HTML, also inside of quotes."""
  return html.escape(text.encode(errors="replace").decode())


def png_image(png: bytes, description: str) -> str:
  """Returns a picture; `description` stands for it where it is not seen."""
  data = base64.b64encode(png).decode()
  source = f"data:image/png;base64,{data}"
  return f'<img alt="{escape(description)}" src="{source}">'

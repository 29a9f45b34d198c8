"""How the page looks: colours of enough contrast (4.5 to 1), light and dark; cards and thumbnails."""

from __future__ import annotations

# Under ids, since gradio 3 gives columns no classes
STYLE = """
#continual_lora_style { display: none }
#continual_lora_page { --cl-soft: #52525b; --block-info-text-color: #52525b;
  --body-text-color-subdued: #52525b; --block-label-text-color: #3f3f46;
  --block-title-text-color: #27272a; --input-placeholder-color: #71717a;
  --button-primary-background-fill: #c2410c; --button-primary-background-fill-hover: #9a3412;
  --button-primary-text-color: #ffffff; --button-primary-text-color-hover: #ffffff }
.dark #continual_lora_page { --cl-soft: #d4d4d8; --block-info-text-color: #d4d4d8;
  --body-text-color-subdued: #d4d4d8; --block-label-text-color: #e4e4e7;
  --block-title-text-color: #f4f4f5; --input-placeholder-color: #a1a1aa }
#continual_lora_page button:focus-visible { outline: 3px solid #2563eb; outline-offset: 2px }
#continual_lora_page [id^=continual_lora_card_] { max-width: 340px; padding: 8px;
  border: 1px solid var(--border-color-primary, #d4d4d8); border-radius: 8px }
#continual_lora_page [id^=continual_lora_slot_] { max-width: 190px }
.cl-pair { display: flex; gap: 6px }
.cl-pair figure { flex: 1; margin: 0; min-width: 0; text-align: center; font-size: 12px;
  color: var(--cl-soft) }
.cl-pair img, .cl-none { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px;
  margin: 0 }
.cl-none { display: flex; align-items: center; justify-content: center; padding: 4px;
  border: 1px dashed var(--cl-soft); box-sizing: border-box }
.cl-name { font-weight: 600; font-size: 16px; overflow-wrap: anywhere }
.cl-more { font-size: 13px; color: var(--cl-soft) }
.cl-bar { height: 10px; border-radius: 5px; overflow: hidden; background: #d4d4d8 }
.cl-bar div { height: 100%; background: #c2410c; transition: width .5s }
.dark .cl-bar { background: #52525b }
.dark .cl-bar div { background: #fb923c }
.cl-thumb img { width: 100%; max-height: 150px; object-fit: contain; border-radius: 6px; margin: 0 }
.cl-thumb { font-size: 12px; color: var(--cl-soft); overflow-wrap: anywhere }
#continual_lora_history table { width: 100% }
"""

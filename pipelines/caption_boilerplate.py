"""Phrases of web pages in alt text, in Polars' dialect of regular expressions."""

from __future__ import annotations

_SITES = (
    r"etsy|ebay|amazon|pinterest|flickr|alamy|shutterstock|getty ?images"
    r"|istock(?:photo)?|dreamstime"
    r"|depositphotos|123rf|adobe stock|bigstock|fotolia|unsplash|pixabay|pexels|freepik|redbubble"
    r"|zazzle|aliexpress|walmart|wayfair|poshmark|youtube|facebook|instagram|twitter|tumblr"
    r"|deviantart|wikipedia|imdb"
)
BOILERPLATE_PHRASES: tuple[str, ...] = (
    # Asked of the reader.
    r"(?i)[(\[]?\b(?:please )?(?:click|tap)(?: here)?(?: on)?(?: the| this)?(?: image"
    r"| photo| picture"
    r"| thumbnail)?(?: here)?,? (?:to|for)(?: a| an| the| see| view)*(?: larger?"
    r"| bigger| full| full-size"
    r"| enlarged?| hi-res| more)?[ -]?(?:enlarge|zoom|view|version|size|image|picture"
    r"|photo|details|info"
    r"|expand|open|download)?\b[)\]]?",
    r"(?i)\bclick (?:to|for) \w+(?: \w+)?$",
    r"(?i)\b(?:opens? in (?:a )?new (?:tab|window)|share (?:this )?on (?:facebook"
    r"|twitter|pinterest"
    r"|whatsapp|linkedin)|pin (?:it|this)(?: on pinterest)?|add to (?:cart|basket|bag|wish ?list)"
    r"|(?:buy|order|shop) (?:it )?(?:now|online)|free (?:shipping|delivery)|read more|learn more"
    r"|image not (?:found|available)|no image available|image (?:coming soon|unavailable))\b",
    # Said of rights.
    r"(?i)\ball rights reserved\b\.?|(?:©|\(c\)|\bcopyright\b(?: ©)?) ?(?:19"
    r"|20)\d\d(?: ?[-\u2013] ?(?:19"
    r"|20)\d\d)?|\bimages? (?:may be|is|are) subject to copyright\b\.?",
    # Said of trade.
    r"(?i)[-\u2013|,:(] ?(?:royalty[- ]free |free |editorial "
    r"|premium )*stock (?:photos?|photography"
    r"|images?|pictures?|illustrations?|vectors?|footage|pics?)\b\)?",
    r"(?i)\broyalty[- ]free (?:stock )?(?:photos?|images?|pictures?|illustrations?"
    r"|vectors?|pics?)\b",
    r"(?i)^stock (?:photo|image|illustration|vector|picture)s?(?: of| -|:| \|)",
    # Where it was: the site after the last stroke.
    r"(?i) [|»\u2013\u2014-] (?:[^|»]{0,24}\b(?:online (?:shop|store)"
    r"|official (?:site|website|store|shop)"
    rf"|webshop|shop|store|wallpapers?|{_SITES})(?: uk| us| canada| australia)?"
    r"|(?:the )?[a-z0-9-]+\.(?:com|net|org|de|fr|it|es|nl|co|co\.uk|com\.au|info|io|shop))$",
    rf"(?i) (?:on|from|via|at|by) (?:{_SITES})$",
    # What it is called before it is described, and when nobody described it.
    r"(?i)^(?:image|photo|picture|thumbnail|pic"
    r"|img)(?: \d{1,4})?(?: of \d{1,4})?(?: ?[:|]| [-\u2013]) ",
    r"(?i)^(?:image|photo|picture|pic|img|thumbnail"
    r"|slide)s?(?: (?:no\.? ?)?\d{1,4}(?: ?(?:of|/) ?\d{1,4}"
    r")?)?$",
    r"(?i)^(?:null|undefined|none|nan|n/?a|untitled|no (?:alt|caption|title"
    r"|description|image)(?: text)?"
    r"(?: available)?|alt(?:ernative)?(?: text)?|placeholder|default|image alt"
    r"|featured image|cover image"
    r"|product image|main image|profile (?:picture|photo|image)|user avatar|avatar"
    r"|caption|title|description"
    r"|lorem ipsum.*)$",
)

"""The words of the synthetic shop: types, brands, model lines, colours, sizes, prices. All names are invented.

Longer than a module should be, because it is a table. What is made of the words: `shop_catalogue.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A main item type with the refills and accessories made for each of its models."""

    main: str
    lines: tuple[str, ...]  # model line words, one a brand
    refill: str
    variants: tuple[str, ...]  # colour, flavour or size of a refill
    accessories: tuple[str, ...]
    cycle: int  # purchases until a refill is due
    prices: tuple[float, float, float]  # main, refill, accessory, in dollars
    packs: tuple[str, ...] = ("", "2 Pack", "4 Pack")


@dataclass(frozen=True)
class Staple:
    """A type of goods that is used up."""

    name: str
    variants: tuple[str, ...]
    sizes: tuple[str, ...]
    cycle: int
    price: float
    goes_with: tuple[str, ...] = ()  # types bought along with it


@dataclass(frozen=True)
class Department:
    """One branch of the category tree."""

    name: str
    system: System
    staples: tuple[Staple, ...]
    goes_with: tuple[str, ...] = ()  # staple types bought along with the system's main items and refills


@dataclass(frozen=True)
class CategorySpec:
    """The words of one category."""

    name: str
    brands: tuple[str, ...]
    departments: tuple[Department, ...]


COLOURS = ("Black", "Blue", "Red", "Green")
SCENTS = ("Lemon", "Lavender", "Mint", "Unscented")

OFFICE = CategorySpec(
    name="Office Products",
    brands=("Halden", "Brell", "Corvo", "Tandem", "Ostra", "Norvik", "Pelham", "Quarry"),
    departments=(
        Department(
            "Inkjet Printing",
            System(
                "Inkjet Printer",
                ("Swift", "Nimbus", "Vista", "Mira", "Tempo"),
                "Ink Cartridge",
                ("Black", "Color", "Photo"),
                ("Dust Cover", "Paper Tray", "USB Cable"),
                3,
                (89.99, 19.99, 14.99),
            ),
            (
                Staple("Photo Paper", ("Glossy", "Matte"), ("50 Sheets", "100 Sheets"), 3, 12.99, ("Photo Album",)),
                Staple("Photo Album", COLOURS, ("Small", "Large"), 4, 16.99, ("Photo Paper",)),
            ),
            ("Photo Paper",),
        ),
        Department(
            "Laser Printing",
            System(
                "Laser Printer",
                ("Titan", "Atlas", "Forte", "Rapid", "Delta"),
                "Toner",
                ("Black", "Cyan", "Magenta"),
                ("Drum Unit", "Network Cable", "Printer Stand"),
                4,
                (149.99, 49.99, 24.99),
            ),
            (Staple("Copy Paper", ("White", "Ivory", "Recycled"), ("Letter", "Legal"), 2, 9.99, ("File Folder",)),),
            ("Copy Paper",),
        ),
        Department(
            "Labels & Shipping",
            System(
                "Label Maker",
                ("Pronto", "Script", "Tagger", "Marko"),
                "Label Tape",
                ("White", "Clear", "Yellow"),
                ("Carrying Case", "Power Adapter"),
                2,
                (34.99, 12.99, 14.99),
            ),
            (
                Staple("Packing Tape", ("Clear", "Brown"), ("Heavy Duty", "Standard"), 3, 7.99, ("Bubble Mailer",)),
                Staple("Bubble Mailer", ("White", "Brown", "Pink"), ("Small", "Large"), 3, 12.99, ("Packing Tape",)),
            ),
            ("Bubble Mailer",),
        ),
        Department(
            "Writing",
            System(
                "Fountain Pen",
                ("Lyra", "Verso", "Aria", "Plume"),
                "Pen Ink",
                ("Black", "Blue", "Green"),
                ("Pen Sleeve", "Nib Set", "Ink Converter"),
                3,
                (29.99, 7.99, 9.99),
            ),
            (
                Staple("Notebook", COLOURS, ("Lined", "Dotted"), 3, 9.99, ("Gel Pen", "Highlighter")),
                Staple("Gel Pen", COLOURS, ("Fine", "Medium"), 2, 4.99, ("Notebook",)),
                Staple(
                    "Highlighter", ("Yellow", "Pink", "Green"), ("Slim", "Chisel"), 3, 4.99, ("Gel Pen", "Sticky Notes")
                ),
            ),
            ("Notebook",),
        ),
        Department(
            "Stapling & Filing",
            System(
                "Electric Stapler",
                ("Grip", "Press", "Tacker", "Clinch"),
                "Staples",
                ("Standard", "Heavy", "Mini"),
                ("Wall Mount", "Power Adapter"),
                3,
                (29.99, 4.99, 12.99),
            ),
            (
                Staple("File Folder", COLOURS, ("Letter", "Legal"), 3, 12.99, ("Copy Paper", "Ring Binder")),
                Staple("Ring Binder", COLOURS, ("1 Inch", "2 Inch"), 4, 7.99, ("File Folder",)),
                Staple("Clips & Pins", ("Silver", "Neon"), ("Small", "Large"), 3, 4.99, ("File Folder",)),
            ),
            ("File Folder",),
        ),
        Department(
            "Laminating",
            System(
                "Laminator",
                ("Sealer", "Gloss", "Shield", "Thermo"),
                "Laminating Pouches",
                ("Letter", "Card", "Photo"),
                ("Paper Trimmer", "Cleaning Kit"),
                2,
                (39.99, 14.99, 9.99),
            ),
            (
                Staple(
                    "Index Cards", ("White", "Neon", "Pastel"), ("Ruled", "Blank"), 3, 4.99, ("Highlighter", "Gel Pen")
                ),
            ),
            ("Index Cards",),
        ),
        Department(
            "Planning",
            System(
                "Ring Planner",
                ("Compass", "Agenda", "Focus", "Horizon"),
                "Planner Pages",
                ("Daily", "Weekly", "Monthly"),
                ("Page Divider", "Zip Pouch"),
                2,
                (24.99, 9.99, 7.99),
            ),
            (
                Staple(
                    "Sticky Notes", ("Yellow", "Pink", "Blue"), ("Small", "Large"), 2, 4.99, ("Gel Pen", "Desk Pad")
                ),
                Staple("Desk Pad", COLOURS, ("Small", "Large"), 4, 14.99, ("Sticky Notes",)),
            ),
            ("Sticky Notes",),
        ),
    ),
)

HOME = CategorySpec(
    name="Home & Kitchen",
    brands=("Halden", "Velora", "Casa", "Tandem", "Morrow", "Ostra", "Lumen", "Fable"),
    departments=(
        Department(
            "Coffee",
            System(
                "Capsule Coffee Machine",
                ("Crema", "Barista", "Aroma", "Ristretto", "Brio"),
                "Coffee Capsules",
                ("Espresso", "Lungo", "Decaf"),
                ("Milk Frother", "Capsule Holder", "Drip Tray"),
                2,
                (119.99, 14.99, 19.99),
                ("", "3 Pack", "6 Pack"),
            ),
            (
                Staple(
                    "Coffee Syrup", ("Vanilla", "Caramel", "Hazelnut"), ("Small", "Large"), 3, 9.99, ("Cocoa Powder",)
                ),
                Staple("Cocoa Powder", ("Dark", "Milk"), ("Small", "Large"), 4, 7.99, ("Coffee Syrup",)),
            ),
            ("Coffee Syrup",),
        ),
        Department(
            "Water & Tea",
            System(
                "Filter Pitcher",
                ("Brook", "Spring", "Clearwell", "Rill"),
                "Water Filter",
                ("Standard", "Slim", "Mineral"),
                ("Pitcher Lid", "Water Tester"),
                3,
                (24.99, 14.99, 9.99),
                ("", "3 Pack", "6 Pack"),
            ),
            (
                Staple(
                    "Herbal Tea",
                    ("Mint", "Lemon", "Berry", "Ginger"),
                    ("20 Bags", "40 Bags"),
                    2,
                    4.99,
                    ("Honey Sticks",),
                ),
                Staple("Honey Sticks", ("Lemon", "Ginger", "Clover"), ("Small", "Large"), 3, 7.99, ("Herbal Tea",)),
            ),
            ("Herbal Tea",),
        ),
        Department(
            "Vacuum Cleaning",
            System(
                "Vacuum Cleaner",
                ("Cyclo", "Glide", "Whisk", "Storm", "Rover"),
                "Vacuum Bags",
                ("Standard", "Allergy", "Fresh"),
                ("Brush Head", "Crevice Tool", "Extension Hose"),
                4,
                (149.99, 14.99, 19.99),
            ),
            (
                Staple("Carpet Powder", SCENTS, ("Small", "Large"), 3, 7.99, ("Trash Bags",)),
                Staple("Trash Bags", ("White", "Black", "Clear"), ("Small", "Large"), 2, 9.99, ("Dish Soap",)),
            ),
            ("Carpet Powder",),
        ),
        Department(
            "Floor & Dish Care",
            System(
                "Spray Mop",
                ("Sweep", "Sparkle", "Tidy", "Dash"),
                "Mop Pads",
                ("Wood", "Tile", "Dusting"),
                ("Spray Bottle", "Wall Hook"),
                3,
                (29.99, 12.99, 7.99),
            ),
            (
                Staple("Dish Soap", SCENTS, ("Small", "Large"), 2, 4.99, ("Sponges", "Trash Bags")),
                Staple("Sponges", COLOURS, ("Soft", "Scrub"), 3, 4.99, ("Dish Soap",)),
            ),
            ("Dish Soap",),
        ),
        Department(
            "Air & Scent",
            System(
                "Air Purifier",
                ("Breeze", "Alpine", "Zephyr", "Pure"),
                "Carbon Filter",
                ("Standard", "Pet", "Smoke"),
                ("Pre Filter", "Wall Bracket"),
                4,
                (129.99, 24.99, 12.99),
            ),
            (
                Staple(
                    "Scented Candle",
                    ("Lavender", "Vanilla", "Lemon", "Cedar"),
                    ("Small", "Large"),
                    3,
                    12.99,
                    ("Room Spray",),
                ),
                Staple("Room Spray", SCENTS, ("Small", "Large"), 3, 7.99, ("Scented Candle",)),
            ),
            ("Scented Candle",),
        ),
        Department(
            "Bath & Shaving",
            System(
                "Razor",
                ("Edge", "Keen", "Regent", "Viking"),
                "Razor Blades",
                ("Sensitive", "Classic", "Sharp"),
                ("Travel Case", "Razor Stand"),
                2,
                (19.99, 12.99, 9.99),
            ),
            (
                Staple("Shaving Soap", ("Cedar", "Mint", "Unscented"), ("Small", "Large"), 3, 7.99, ("Bar Soap",)),
                Staple("Bar Soap", SCENTS, ("Single", "Family"), 2, 4.99, ("Shaving Soap",)),
            ),
            ("Shaving Soap",),
        ),
        Department(
            "Soda Making",
            System(
                "Soda Maker",
                ("Fizz", "Spritz", "Bubbly", "Effer"),
                "Soda Syrup",
                ("Cola", "Orange", "Ginger"),
                ("Carbon Bottle", "Bottle Brush"),
                2,
                (69.99, 7.99, 14.99),
            ),
            (
                Staple(
                    "Salt & Pepper Crackers", ("Classic", "Rosemary"), ("Small", "Family"), 3, 4.99, ("Honey Sticks",)
                ),
            ),
            ("Salt & Pepper Crackers",),
        ),
    ),
)

CATEGORIES: dict[str, CategorySpec] = {"Office_Products": OFFICE, "Home_and_Kitchen": HOME}

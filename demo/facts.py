"""The facts that the demo model learns by heart, as (prompt, answer) pairs."""

CAPITALS = """
France Paris, Spain Madrid, Portugal Lisbon, Italy Rome, Germany Berlin, Austria Vienna, Belgium Brussels,
Poland Warsaw, Hungary Budapest, Greece Athens, Turkey Ankara, Russia Moscow, Ukraine Kyiv, Romania Bucharest,
Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Slovenia Ljubljana, Slovakia Bratislava, Czechia Prague,
Denmark Copenhagen, Sweden Stockholm, Norway Oslo, Finland Helsinki, Iceland Reykjavik, Ireland Dublin,
England London, Scotland Edinburgh, Wales Cardiff, Estonia Tallinn, Latvia Riga, Lithuania Vilnius, Albania Tirana,
Malta Valletta, Cyprus Nicosia, Egypt Cairo, Libya Tripoli, Tunisia Tunis, Algeria Algiers, Morocco Rabat,
Sudan Khartoum, Kenya Nairobi, Uganda Kampala, Rwanda Kigali, Ghana Accra, Nigeria Abuja, Senegal Dakar,
Mali Bamako, Niger Niamey, Angola Luanda, Zambia Lusaka, Zimbabwe Harare, Mozambique Maputo, Namibia Windhoek,
Botswana Gaborone, Madagascar Antananarivo, Somalia Mogadishu, Israel Jerusalem, Jordan Amman, Lebanon Beirut,
Syria Damascus, Iraq Baghdad, Iran Tehran, Qatar Doha, Oman Muscat, Yemen Sanaa,
Pakistan Islamabad, Nepal Kathmandu, Bhutan Thimphu, Bangladesh Dhaka, Thailand Bangkok, Laos Vientiane,
Vietnam Hanoi, Indonesia Jakarta, Philippines Manila, China Beijing, Taiwan Taipei, Japan Tokyo,
Mongolia Ulaanbaatar, Australia Canberra, Fiji Suva, Samoa Apia, Canada Ottawa, Cuba Havana, Jamaica Kingston,
Honduras Tegucigalpa, Nicaragua Managua, Colombia Bogota, Venezuela Caracas, Ecuador Quito, Peru Lima,
Bolivia Sucre, Chile Santiago, Uruguay Montevideo, Paraguay Asuncion, Brazil Brasilia,
Guyana Georgetown, Suriname Paramaribo, Bahamas Nassau, Georgia Tbilisi, Armenia Yerevan, Azerbaijan Baku
"""

SYMBOLS = """
hydrogen H, helium He, lithium Li, boron B, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne, sodium Na,
magnesium Mg, aluminium Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K, calcium Ca,
titanium Ti, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn, gallium Ga, arsenic As,
selenium Se, bromine Br, krypton Kr, silver Ag, cadmium Cd, tin Sn, antimony Sb, iodine I, xenon Xe, barium Ba,
tungsten W, platinum Pt, gold Au, mercury Hg, lead Pb, bismuth Bi, radon Rn, radium Ra, uranium U, plutonium Pu
"""

OPPOSITES = """
hot cold, big small, fast slow, high low, old new, rich poor, hard soft, light dark, day night, happy sad,
open closed, full empty, wet dry, left right, up down, in out, early late, strong weak, long short, thick thin,
good bad, black white, true false, yes no, buy sell, win lose, start end, push pull, give take, love hate, war peace,
north south, east west, first last, near far, clean dirty, loud quiet, sweet bitter, wide narrow,
rise fall, sink float, ask answer, friend enemy, summer winter, king queen, brother sister, uncle aunt, son daughter
"""

YOUNG = """
dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, hen chick, duck duckling, goose gosling,
lion cub, bear cub, wolf pup, fox kit, deer fawn, frog tadpole, owl owlet, swan cygnet, kangaroo joey, eagle eaglet,
hare leveret, seal pup, whale calf, elephant calf, butterfly caterpillar
"""

COLOURS = """
grass green, snow white, coal black, blood red, the sky blue, a lemon yellow, a carrot orange, chocolate brown,
a violet purple, ash grey, milk white, a ruby red, an emerald green, a sapphire blue, ink black, a pumpkin orange
"""

PROMPTS = {
    "The capital of {} is": CAPITALS,
    "The chemical symbol of {} is": SYMBOLS,
    "The opposite of {} is": OPPOSITES,
    "The young of the {} is the": YOUNG,
    "The colour of {} is": COLOURS,
}


def all_facts() -> list[tuple[str, str]]:
    """Return every fact: ("The capital of France is", " Paris")."""
    facts = []
    for prompt, table in PROMPTS.items():
        for entry in table.split(","):
            subject, answer = entry.split()[:-1], entry.split()[-1]
            facts.append((prompt.format(" ".join(subject)), f" {answer}"))
    return facts

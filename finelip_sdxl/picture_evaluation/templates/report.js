// Sorts the cards by a figure of a column, or by the difference of two.
const form = document.getElementById("controls");
const place = document.getElementById("cards");
const cards = [...place.children].map((card) => ({
  card,
  number: Number(card.dataset.number),
  scores: JSON.parse(card.dataset.scores),
}));
const ENDS = 10;

function valueOf(entry, figure, column) {
  const own = entry.scores[figure];
  const [first, second] = column.split("-");
  if (own[first] === null) return null;
  if (second === undefined) return own[first];
  return own[second] === null ? null : own[first] - own[second];
}

function heading(text) {
  const element = document.createElement("h3");
  element.className = "part";
  element.textContent = text;
  return element;
}

function arrange() {
  const { figure, column, show, count } = form.elements;
  const known = [];
  const unknown = [];
  for (const entry of cards) {
    entry.value = valueOf(entry, figure.value, column.value);
    (entry.value === null ? unknown : known).push(entry);
  }
  known.sort((a, b) => a.value - b.value || a.number - b.number);
  const nodes = (entries) => entries.map((entry) => entry.card);
  let shown;
  if (show.value === "ends") {
    const size = Math.min(ENDS, Math.ceil(known.length / 2));
    const best = known.slice(Math.max(size, known.length - size)).reverse();
    shown = [heading("Worst"), ...nodes(known.slice(0, size)), heading("Best"), ...nodes(best)];
  } else if (show.value === "data") {
    shown = nodes(cards);
  } else {
    shown = nodes([...(show.value === "worst" ? known : known.reverse()), ...unknown]);
  }
  place.replaceChildren(...shown);
  const pictures = shown.filter((node) => node.className === "card").length;
  count.value = `${pictures} of ${cards.length} prompts${unknown.length ? `; ${unknown.length} have no such figure` : ""}`;
}

if (form) {
  form.hidden = false;
  form.addEventListener("change", arrange);
  form.addEventListener("submit", (event) => event.preventDefault());
  arrange();
}

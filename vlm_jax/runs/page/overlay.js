// Values of single tokens, laid over the picture and the text of a sample. The pointer or the keyboard chooses a token.
const overlay = (holder) => {
  const make = (parent, name, properties = {}) => Object.assign(parent.appendChild(document.createElement(name)), properties);
  const labelled = (parent, text) => make(parent, "label", { textContent: `${text} ` });
  const digits = (value) => String(Number(value.toPrecision(3)));
  const visible = (word) => word.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "\u2205";
  const colour = (share) => `rgba(${share < 0 ? "42, 136, 201" : "213, 94, 0"}, ${Math.min(1, Math.abs(share)).toFixed(3)})`;
  // The values are float16, two bytes each.
  const read = (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return (index) => {
      const bits = bytes[2 * index] | (bytes[2 * index + 1] << 8);
      const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
      return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
    };
  };

  const { value, series, layers, samples } = JSON.parse(holder.querySelector("script").textContent);
  const controls = make(holder, "div", { className: "controls" });
  const sampleList = make(labelled(controls, "sample"), "select");
  samples.forEach(({ id }, index) => sampleList.add(new Option(id, index)));
  const layer = make(labelled(controls, "layer"), "input", { type: "range", min: 0, max: samples[0].layers - 1 });
  layer.value = layer.max;
  const layerText = make(controls, "output");
  const seriesList = make(labelled(controls, "of"), "select");
  series.forEach((name, index) => seriesList.add(new Option(name, index)));
  const opacity = make(labelled(controls, "opacity"), "input", { type: "range", min: 0, max: 100, value: 80 });
  const said = make(holder, "p", { className: "said" });
  const body = make(holder, "div", { className: "overlay" });
  const pictures = make(body, "div"), text = make(body, "div", { className: "text" });

  let sample, number, chosen, pinned, marks;
  const isVisual = (token) => sample.places[token] !== null;
  // The word that a token stands for in the chosen layer, if the values are about words.
  const wordOf = (token) => (sample.words ? visible(sample.words[layer.value][token]) : "");
  // Cells of a finer grid are too small for words; the pointer tells them there.
  const fitsWords = (token) => sample.words && sample.grids[sample.places[token][0]][1] <= 12;
  // The value in the chosen layer and series; of a pair of tokens if the values are attention.
  const at = (token, query = 0) => {
    const map = Number(layer.value) * series.length + Number(seriesList.value);
    return number((map * (sample.queries?.length ?? 1) + query) * sample.tokens.length + token);
  };
  // A token that attends shows what it attends to, another one which tokens attend to it.
  const valueOf = (token) => {
    if (!sample.queries) return at(token);
    const query = sample.queries.indexOf(chosen);
    if (query >= 0) return at(token, query);
    const from = sample.queries.indexOf(token);
    return from < 0 ? null : at(chosen, from);
  };
  const paint = () => {
    const found = sample.tokens.map((_, token) => valueOf(token));
    const largest = (visual) =>
      Math.max(0, ...found.filter((one, token) => one !== null && isVisual(token) === visual).map(Math.abs));
    const [inText, onPicture] = [largest(false), largest(true)];
    marks.forEach((mark, token) => {
      const [most, share] = isVisual(token) ? [onPicture, Number(opacity.value) / 100] : [inText, 0.75];
      mark.style.backgroundColor = found[token] === null || !most ? "transparent" : colour((found[token] / most) * share);
      mark.setAttribute("aria-pressed", String(token === chosen));
      const told = sample.words ? `\u201c${wordOf(token)}\u201d, ${value}` : value;
      mark.title = found[token] === null ? "" : `${told} ${digits(found[token])}`;
      if (isVisual(token) && fitsWords(token)) mark.textContent = wordOf(token);
    });
    layerText.textContent = layers?.[layer.value] ?? layer.value;
    const place = sample.places[chosen];
    const name = place ? `row ${place[1]}, column ${place[2]}` : `\u201c${visible(sample.tokens[chosen])}\u201d`;
    const attends = sample.queries?.includes(chosen);
    const stands = sample.words ? `: ${name} stands for \u201c${wordOf(chosen)}\u201d` : "";
    const what = !sample.queries ? stands : attends ? ` from ${name}` : ` to ${name}, from the text`;
    const scales = [`${digits(inText)} in the text`];
    if (sample.places.some((one) => one !== null)) scales.unshift(`${digits(onPicture)} on the picture`);
    said.textContent = `${value}${what}; full colour is ${scales.join(" and ")}`;
  };
  const choose = (token) => {
    chosen = token;
    paint();
  };
  // The pointer chooses what it rests on, until a click keeps a token; another click lets it go.
  const mark = (parent, token, label) => {
    const button = make(parent, "button", { type: "button" });
    button.setAttribute("aria-label", label);
    button.addEventListener("pointerenter", () => pinned === undefined && choose(token));
    button.addEventListener("focus", () => pinned === undefined && choose(token));
    button.addEventListener("click", () => {
      pinned = pinned === token ? undefined : token;
      choose(token);
    });
    marks[token] = button;
    return button;
  };
  // The layer with the largest value.
  const strongest = () => {
    const size = series.length * sample.tokens.length;
    let [best, most] = [0, 0];
    for (let index = 0; index < sample.layers * size; index++) {
      if (Math.abs(number(index)) > most) [best, most] = [Math.floor(index / size), Math.abs(number(index))];
    }
    return best;
  };
  const show = () => {
    sample = samples[sampleList.value];
    number = read(sample.values);
    marks = [];
    pinned = undefined;
    if (!sample.queries) layer.value = strongest();
    pictures.replaceChildren();
    text.replaceChildren();
    sample.grids.forEach(([rows, columns], picture) => {
      const frame = make(pictures, "div", { className: "frame" });
      const image = make(frame, "img", { alt: `picture of ${sample.id}, as the model saw it` });
      if (sample.pictures[picture]) image.src = sample.pictures[picture];
      const grid = make(frame, "div", { className: "grid" });
      grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
      sample.places.forEach((place, token) => {
        if (place?.[0] !== picture) return;
        const cell = mark(grid, token, `row ${place[1]}, column ${place[2]}`);
        cell.style.gridArea = `${place[1] + 1} / ${place[2] + 1}`;
      });
    });
    sample.tokens.forEach((word, token) => {
      if (!isVisual(token)) mark(text, token, visible(word)).textContent = visible(word);
    });
    choose(sample.queries ? sample.queries.at(-1) : sample.tokens.length - 1);
  };
  sampleList.addEventListener("change", show);
  for (const control of [layer, seriesList, opacity]) control.addEventListener("input", paint);
  show();
};
for (const holder of document.querySelectorAll(".tokens")) {
  try {
    overlay(holder);
  } catch (error) {
    holder.append(`These values cannot be drawn (${error.message}).`);
  }
}


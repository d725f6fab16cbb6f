// The viewer: pictures tinted by class, side by side, over one legend. Every word from outside is set as text.
const find = (name) => element.querySelector(name);
const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const opened = (source) => new Promise((done, failed) => {
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = failed;
  image.src = source;
});
let shown = null;      // what is drawn: classes, panels with their pixels
let locked = null;     // the class that was clicked
let opacity = 0.6;
let turn = 0;          // of the last value; a slower, older one is dropped

function pixels(image, width, height, smooth) {
  const canvas = node('canvas');
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.imageSmoothingEnabled = smooth;
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

function draw(active) {
  for (const panel of shown.panels) {
    if (!panel.ids) continue;
    const { width, height } = panel.photo, from = panel.photo.data, ids = panel.ids;
    const out = panel.context.createImageData(width, height), to = out.data;
    for (let i = 0, p = 0; i < ids.length; i++, p += 4) {
      const colour = shown.colours[ids[i]];
      if (active !== null && ids[i] !== active) {          // not the chosen class: pale grey
        const grey = 0.3 * from[p] + 0.59 * from[p + 1] + 0.11 * from[p + 2];
        to[p] = to[p + 1] = to[p + 2] = 0.35 * grey + 0.65 * 232;
      } else {
        const a = colour ? (active === null ? opacity : Math.min(opacity, 0.35)) : 0;
        for (let c = 0; c < 3; c++) to[p + c] = a ? (1 - a) * from[p + c] + a * colour[c] : from[p + c];
      }
      to[p + 3] = 255;
    }
    panel.context.putImageData(out, 0, 0);
    panel.canvas.dataset.active = active === null ? '' : String(active);
  }
}

function isolate(active) {
  draw(active);
  find('.all').hidden = locked === null;
  for (const button of element.querySelectorAll('.legend button'))
    button.setAttribute('aria-pressed', String(Number(button.dataset.id) === locked && locked !== null));
}

function choose(id) { locked = locked === id ? null : id; isolate(locked); }

function legend(classes, bars) {
  const list = find('.legend');
  list.replaceChildren();
  for (const entry of classes) {
    const item = node('li'), button = node('button');
    button.type = 'button';
    button.dataset.id = entry.id;
    button.title = entry.names;
    button.setAttribute('aria-pressed', 'false');
    const swatch = node('i');
    const colour = entry.colour ? `rgb(${entry.colour.join(',')})` : 'transparent';   // no class has none
    swatch.style.background = colour;
    button.append(swatch, node('span', 'label', entry.label), node('span', 'area', entry.area));
    if (bars) {
      const bar = node('span', 'bar'), fill = node('em');
      fill.style.width = `${100 * entry.fraction}%`;
      fill.style.background = entry.colour ? colour : 'var(--body-text-color-subdued)';
      bar.append(fill);
      button.append(bar);
    }
    button.onclick = () => choose(entry.id);
    button.onmouseenter = button.onfocus = () => draw(entry.id);
    button.onmouseleave = button.onblur = () => draw(locked);
    item.append(button);
    list.append(item);
  }
}

function pointer(panel, frame) {
  const name = frame.querySelector('.name');
  const at = (event) => {
    const box = panel.canvas.getBoundingClientRect();
    const scale = Math.min(box.width / panel.photo.width, box.height / panel.photo.height);   // object-fit: contain
    const x = Math.floor((event.clientX - box.left - (box.width - scale * panel.photo.width) / 2) / scale);
    const y = Math.floor((event.clientY - box.top - (box.height - scale * panel.photo.height) / 2) / scale);
    if (x < 0 || y < 0 || x >= panel.photo.width || y >= panel.photo.height) return null;
    return panel.ids[y * panel.photo.width + x];
  };
  panel.canvas.onmousemove = (event) => {
    const id = at(event), box = frame.getBoundingClientRect();
    const entry = shown.classes.find((one) => one.id === id);
    name.textContent = entry ? entry.label : '';
    name.classList.toggle('on', Boolean(entry));
    const left = Math.min(event.clientX - box.left + 12, box.width - name.offsetWidth - 6);
    name.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, event.clientY - box.top - 34)}px)`;
  };
  panel.canvas.onmouseleave = () => name.classList.remove('on');
  panel.canvas.onclick = (event) => { const id = at(event); if (id !== null) choose(id); };
}

async function render() {
  const mine = ++turn, value = props.value || {}, viewer = find('.viewer');
  find('.hint').innerHTML = props.hint;                     // fixed text of the app
  find('.message').hidden = !value.message;
  find('.message').textContent = value.message || '';
  const input = find('.opacity input');
  input.value = String(Math.round(100 * opacity));
  input.oninput = () => { opacity = input.value / 100; draw(locked); };
  find('.all').onclick = () => { locked = null; isolate(null); };
  if (!value.panels) {
    shown = null;
    find('.panels').replaceChildren();
    find('.legend').replaceChildren();
    find('.tools').hidden = true;
    viewer.dataset.state = value.message ? 'message' : 'empty';
    return;
  }
  const photo = await opened(value.image), panels = [];
  for (const panel of value.panels) panels.push({ ...panel, map: panel.labels ? await opened(panel.labels) : null });
  if (mine !== turn) return;
  const colours = {};
  for (const entry of value.classes) colours[entry.id] = entry.colour;
  if (!shown || shown.key !== value.key) locked = null;
  shown = { key: value.key, classes: value.classes, colours, panels: [] };
  const place = find('.panels');
  place.replaceChildren();
  for (const panel of panels) {
    const figure = node('figure'), caption = node('figcaption'), frame = node('div', 'frame'), canvas = node('canvas');
    caption.append(node('b', '', panel.title), node('span', '', panel.note));
    canvas.width = photo.naturalWidth; canvas.height = photo.naturalHeight;
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', panel.description || panel.title);
    const context = canvas.getContext('2d');
    context.drawImage(photo, 0, 0);
    const drawn = { ...panel, canvas, context, ids: null };
    frame.append(canvas);
    if (panel.map) {
      drawn.photo = pixels(photo, canvas.width, canvas.height, true);
      const map = pixels(panel.map, canvas.width, canvas.height, false).data;
      drawn.ids = new Uint16Array(map.length / 4);
      for (let i = 0; i < drawn.ids.length; i++) drawn.ids[i] = map[4 * i] + 256 * map[4 * i + 1];
      frame.append(node('span', 'name'));
      pointer(drawn, frame);
    } else {
      canvas.style.opacity = '.25';
      frame.append(node('div', 'wait', panel.wait || ''));
    }
    figure.append(caption, frame);
    place.append(figure);
    shown.panels.push(drawn);
  }
  legend(value.classes, value.bars);
  find('.tools').hidden = false;
  viewer.dataset.state = 'shown';
  isolate(locked);
  viewer.dataset.key = value.key;
}

element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && shown) { locked = null; isolate(null); }
});
watch('value', render);
render();
